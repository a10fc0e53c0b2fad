"""What a run says about itself: the metrics file first, everything else from it."""
