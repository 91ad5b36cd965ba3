from fastlars.optim import group_entries  # old name

count_step = group_entries.count_step  # old name
show_steps = group_entries.ensure_step_count  # old name
take_names = group_entries.pop_param_names  # old name
