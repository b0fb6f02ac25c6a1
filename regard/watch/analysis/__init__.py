"""What can be computed from a recording: head types, rollout and flow, comparisons."""
