"""Stage ``finished_table``: a table that lies there, made by an import or by another recipe."""
