"""How a model that knows of one device trains on many: mesh, reduction, and the order in which they are applied."""
