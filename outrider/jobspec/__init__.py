"""Job files: YAML text -> `outrider.model.job.Job`, every mistake told with line and column."""
