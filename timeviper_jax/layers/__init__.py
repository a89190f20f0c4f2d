"""What both the language model and the encoders are made of."""
