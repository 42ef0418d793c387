"""The audit: scans that end in a verdict, and say how sure it is and what was not tested."""
