"""How tables lie on a disk or in an object store, and what makes them complete."""
