"""How much the loss rises for every level of every layer, measured once."""
