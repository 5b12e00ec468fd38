"""The geometry of the rows of a sparse tensor: masks, tiles, coordinates, kernel maps, packing."""
