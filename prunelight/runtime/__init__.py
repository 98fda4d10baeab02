"""What every folder above may use: processes, devices, measuring, files, arguments."""
