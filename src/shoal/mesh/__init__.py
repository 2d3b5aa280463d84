"""The rank of this process, its device mesh, and its connections to the other ranks."""
