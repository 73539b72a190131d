"""Everything that outlives a process: videos in, reconstructions out."""
