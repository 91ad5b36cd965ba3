"""What a run writes: checkpoints, records, pictures, tables, lines on the terminal."""
