"""Tools used to make what the package ships."""
