"""Records of attention calls: joined, saved, loaded and exported."""
