"""What any room may need of the machine: disk, terminal, network, processor, signals. No torch but in one file."""
