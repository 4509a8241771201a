"""What a backend may not assume of memory: churn, leaks, data rewritten in place."""
