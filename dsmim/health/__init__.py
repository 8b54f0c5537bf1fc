"""What happens when a run is interrupted or fails: signals, exit statuses, lost ranks, memory limits, replay files."""
