"""The hybrid language model and TransV."""
