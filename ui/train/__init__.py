"""The Train page: three answers, a plan, a queue, and a run that is watched."""
