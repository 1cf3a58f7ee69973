"""Files -> tables of inputs."""
