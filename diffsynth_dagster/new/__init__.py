"""Write a recipe for a data set from a template: `python -m diffsynth_dagster.new`."""
