"""Which layout, which size, at what price: what `shoal plan` answers."""
