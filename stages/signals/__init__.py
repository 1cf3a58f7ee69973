"""Tables of inputs -> tables of what a model says of them."""
