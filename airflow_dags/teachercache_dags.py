"""The file that Airflow finds the DAGs in: all of them, of every recipe that can be read."""

from teachercache_graph import make_dags

for _dag in make_dags()[0]:
    globals()[_dag.dag_id] = _dag
