"""The evaluations with the real packages, tiny models and local servers: no network, and scores that one can count."""
