"""What serving a model costs on this machine, beside what its shape promises."""
