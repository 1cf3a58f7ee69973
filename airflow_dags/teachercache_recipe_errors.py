"""Airflow shows what this file raises as an import error: recipes that have no DAGs, and why.

It is a file of its own because Airflow drops every DAG of a file that raises.
"""

from teachercache_graph import make_dags
from teachercache_recipes import RecipeError

if _problems := make_dags()[1]:
    raise RecipeError("\n".join(_problems))
