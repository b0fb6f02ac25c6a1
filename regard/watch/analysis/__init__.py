"""Analysis of recordings: head types, rollout and flow, comparisons."""
