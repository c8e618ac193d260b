"""From a command line to ranks: flags, host files, DeepSpeed's launcher as a child, its exit code."""
