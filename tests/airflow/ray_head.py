"""Run by the worker's python: a Ray head, until standard input ends; prints where it takes jobs.

It asks for the token in the home folder, as every head does that ``ray start`` starts after a
``ray.init`` on the same machine.
"""

import sys

from tests.servers.ray_cluster import ray_cluster

if __name__ == "__main__":
    with ray_cluster(num_cpus=2, num_gpus=0, env={"RAY_AUTH_TOKEN": ""}) as cluster:
        sys.stdout.write(f"{cluster.jobs_address}\n")
        sys.stdout.flush()
        sys.stdin.read()
