"""Other people's formats, one file each: what a run reads and writes, and no idea of the lesson."""
