"""What training does when it is killed, asked to stop, or given what is broken."""
