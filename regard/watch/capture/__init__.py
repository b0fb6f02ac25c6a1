"""How calls of attention are found inside of any model while it runs."""
