"""What every other folder may use: processes, devices, measuring, files, arguments."""
