// Draws the list of conversations stored in this browser. gr.HTML provides element and trigger.
const list = element.querySelector('.mh-chats');
const PREFIX = 'medhead:c:';
let full = false;

function stored() {
  const found = [];
  for (let index = 0; index < localStorage.length; index++) {
    const key = localStorage.key(index);
    if (!key.startsWith(PREFIX)) continue;
    try {
      const conversation = JSON.parse(localStorage.getItem(key));
      if (conversation && conversation.id) found.push(conversation);
    } catch (error) { /* not a conversation */ }
  }
  return found.sort((a, b) => (b.updated || 0) - (a.updated || 0));
}

const make = (tag, cls, text) => {
  const node = document.createElement(tag);
  node.className = cls;
  if (text !== undefined) node.textContent = text;
  if (tag === 'button') node.type = 'button';
  return node;
};

function draw() {
  const current = sessionStorage.getItem('medhead:current');
  const nodes = [make('button', 'mh-new', 'New chat')];
  const rows = make('div', 'mh-rows');
  for (const conversation of stored()) {
    const row = make('div', 'mh-row' + (conversation.id === current ? ' mh-current' : ''));
    const open = make('button', 'mh-open', conversation.title || 'Untitled');
    open.title = conversation.title;
    open.dataset.id = conversation.id;
    const remove = make('button', 'mh-remove', '×');
    remove.title = 'Delete this conversation';
    remove.setAttribute('aria-label', `Delete the conversation ${open.textContent}`);
    if (conversation.id === current) open.setAttribute('aria-current', 'true');
    remove.dataset.id = conversation.id;
    row.append(open, remove);
    rows.append(row);
  }
  if (!rows.children.length) rows.append(make('div', 'mh-none', 'Conversations are stored in this browser only.'));
  nodes.push(rows);
  if (full) nodes.push(make('div', 'mh-full', 'This browser’s storage is full: delete a conversation.'));
  list.replaceChildren(...nodes);
}

element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  const id = button.dataset.id;
  if (button.classList.contains('mh-new')) trigger('new_chat', {});
  else if (button.classList.contains('mh-open')) {
    const conversation = JSON.parse(localStorage.getItem(PREFIX + id) || 'null');
    if (conversation) trigger('open', { conversation });
  } else if (!button.classList.contains('mh-sure')) {  // the first click asks for confirmation
    button.classList.add('mh-sure');
    button.textContent = 'Delete?';
    const label = button.getAttribute('aria-label');
    button.setAttribute('aria-label', label + ': are you sure?');
    setTimeout(() => {
      button.classList.remove('mh-sure');
      button.textContent = '×';
      button.setAttribute('aria-label', label);
    }, 3000);
  } else {
    localStorage.removeItem(PREFIX + id);
    if (id === sessionStorage.getItem('medhead:current')) trigger('new_chat', {});
    draw();
  }
});

window.addEventListener('medhead:stored', (event) => { full = event.detail.failed; draw(); });
window.addEventListener('storage', draw);
draw();

// On narrow screens the sidebars cover the conversation: they start closed, and close after a click in the list.
const close = (which) => document.querySelectorAll(which + '.open .toggle-button').forEach((button) => button.click());
setTimeout(() => {
  for (const [which, name] of [['.sidebar.mh-left', 'Conversations and sampling'], ['.sidebar.mh-right', 'Speculative decoding']]) {
    document.querySelector(which + ' .toggle-button').setAttribute('aria-label', 'Open or close: ' + name);
  }
  if (innerWidth < 1100) close('.sidebar.mh-right');
  if (innerWidth < 900) close('.sidebar.mh-left');
  setTimeout(() => document.body.classList.add('mh-ready'), 350);
}, 0);
element.addEventListener('click', (event) => {
  if (innerWidth < 900 && event.target.closest('.mh-open, .mh-new')) close('.sidebar.mh-left');
});
