"""pymoo operators on genomes, one idea a file."""
