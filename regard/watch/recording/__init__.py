"""What a watch collects: records, in memory and in files."""
