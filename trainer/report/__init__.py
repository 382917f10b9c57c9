"""All that is to be known of a run, as one page that needs no other file: `lorasmith report`."""
