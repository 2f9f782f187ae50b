"""What the project promises about crashes, broken data and long runs, tried many times over: `make trust`."""
