"""`expo compare`: paired comparison of runs; what it reads and finds is used by the report too."""
