"""Names and bytes on disk: model folders, read and written one tensor at a time."""
