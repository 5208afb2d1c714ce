"""The demo: a trio trained on the spot, and its reward against α. `bash demo/run.sh` runs it."""
