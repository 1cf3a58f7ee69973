"""Run by the worker's python: a Ray head, until standard input ends; prints where it takes jobs."""

import sys

from tests.servers.ray_cluster import ray_cluster

if __name__ == "__main__":
    with ray_cluster(num_cpus=2, num_gpus=0, env={}) as cluster:
        sys.stdout.write(f"{cluster.jobs_address}\n")
        sys.stdout.flush()
        sys.stdin.read()
