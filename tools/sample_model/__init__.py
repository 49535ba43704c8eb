"""How the sample model that ships with autoflux was made: scenes, captions, training, export."""
