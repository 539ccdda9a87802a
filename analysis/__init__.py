"""What can be asked of predictions afterwards: one command each."""
