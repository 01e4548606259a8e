"""What serves one optional package or one special need, and no idea of the lesson."""
