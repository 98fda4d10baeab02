"""What makes a run that was stopped go on as the same run."""
