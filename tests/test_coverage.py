"""Many kinds of network through the same rules: the masked-teacher proof for each."""
