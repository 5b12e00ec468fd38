"""Where the rows of a sparse tensor lie: masks, tiles, coordinates, kernel maps, packing."""
