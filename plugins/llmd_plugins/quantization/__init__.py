"""Ways to store and apply the weights of linears."""
