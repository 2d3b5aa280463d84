"""How long a step takes: rates of a machine, the time of each part, and what measured steps teach."""
