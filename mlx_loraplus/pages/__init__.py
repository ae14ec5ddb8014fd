"""HTML pages without external resources: their parts, charts, and answers as differences."""
