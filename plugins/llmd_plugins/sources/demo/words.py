"""The words that the demo model's dialogues are made of."""

HEROES: dict[str, str] = {
    # hero -> where it lives
    "cat": "house", "dog": "farm", "fox": "forest", "bear": "forest", "rabbit": "meadow", "mouse": "barn",
    "owl": "forest", "horse": "farm", "duck": "pond", "frog": "pond", "turtle": "beach", "whale": "sea",
    "penguin": "island", "lion": "valley", "elephant": "valley", "monkey": "jungle", "parrot": "jungle",
    "squirrel": "park", "hedgehog": "garden", "bee": "garden", "snail": "garden", "goat": "mountain",
    "wolf": "forest", "deer": "forest", "tiger": "jungle", "crab": "beach", "dolphin": "sea", "dragon": "mountain",
    "robot": "city", "wizard": "tower", "knight": "castle", "princess": "castle", "king": "castle", "queen": "castle",
    "pirate": "island", "sailor": "harbour", "farmer": "farm", "baker": "village", "teacher": "village",
    "doctor": "town", "painter": "town", "gardener": "village", "child": "village", "boy": "town", "girl": "town",
    "ghost": "castle", "giant": "mountain", "star": "sky", "cloud": "sky", "little train": "valley",
}  # fmt: skip

ANIMALS = [
    "cat", "dog", "fox", "bear", "rabbit", "mouse", "owl", "horse", "duck", "frog", "turtle", "whale", "penguin", "lion",
    "elephant", "monkey", "parrot", "squirrel", "hedgehog", "bee", "snail", "goat", "wolf", "deer", "tiger", "crab",
    "dolphin", "cow", "sheep", "pig", "hen", "goose", "swan", "eagle", "shark", "snake", "zebra", "camel", "ant", "otter",
]  # fmt: skip
FRUITS = [
    "apple", "banana", "cherry", "grape", "lemon", "mango", "orange", "peach", "pear", "plum", "melon", "fig", "kiwi",
    "lime", "berry", "apricot", "coconut", "papaya", "date", "raspberry",
]  # fmt: skip
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "grey", "pink", "purple", "orange", "silver"]
FOODS = [
    "bread", "cheese", "butter", "soup", "rice", "cake", "honey", "egg", "salad", "pasta", "pizza", "milk", "tea", "coffee",
    "juice", "water", "sugar", "salt", "pepper", "carrot", "potato", "tomato", "onion", "bean", "corn", "nut", "cookie",
]  # fmt: skip
THINGS = [
    "book", "lamp", "chair", "table", "door", "window", "key", "map", "clock", "cup", "spoon", "bottle", "box", "bag",
    "hat", "coat", "shoe", "ring", "ball", "kite", "drum", "bell", "candle", "mirror", "pencil", "paper", "letter",
    "boat", "car", "train", "bike", "bus", "plane", "wheel", "phone", "camera", "computer", "keyboard", "screen",
    "basket", "blanket", "pillow", "ladder", "hammer", "rope", "stone", "coin", "feather", "shell", "flower", "lantern",
]  # fmt: skip
PLACES = [
    "garden", "forest", "river", "lake", "beach", "mountain", "island", "village", "town", "city", "castle", "bridge",
    "market", "school", "library", "harbour", "farm", "park", "valley", "meadow", "tower", "museum", "station", "hill",
]  # fmt: skip
JOBS = [
    "baker", "teacher", "doctor", "painter", "farmer", "sailor", "pilot", "nurse", "writer", "singer", "lawyer",
    "engineer", "driver", "gardener", "cook", "dentist", "student", "carpenter", "scientist", "programmer",
]  # fmt: skip
NATURE = [
    "sun", "moon", "star", "cloud", "rain", "snow", "wind", "storm", "sea", "sky", "tree", "leaf", "grass", "sand", "fire",
    "ice", "night", "day", "morning", "evening", "spring", "summer", "autumn", "winter", "earth", "ocean", "rainbow",
]  # fmt: skip
ADJECTIVES = [
    "big", "small", "happy", "sad", "old", "young", "new", "fast", "slow", "warm", "cold", "kind", "brave", "quiet",
    "loud", "clever", "funny", "gentle", "proud", "shy", "strong", "soft", "sweet", "tiny", "wise", "bright", "dark",
    "curious", "lonely", "patient", "friendly", "lazy",
]  # fmt: skip
VERBS = [
    "run", "walk", "jump", "swim", "fly", "sing", "dance", "read", "write", "draw", "paint", "build", "cook", "bake",
    "eat", "drink", "sleep", "dream", "laugh", "smile", "play", "learn", "teach", "help", "find", "give", "take", "open",
    "close", "listen", "look", "speak", "think", "work", "travel", "climb", "throw", "catch", "carry", "wait",
]  # fmt: skip
TECH = [
    "server", "model", "token", "memory", "cache", "block", "batch", "queue", "stream", "plugin", "daemon", "socket",
    "kernel", "thread", "process", "python", "linux", "config", "prompt", "adapter", "scheduler", "request", "answer",
]  # fmt: skip
OTHER = [
    "hello", "world", "yes", "no", "please", "thanks", "friend", "family", "mother", "father", "sister", "brother", "baby",
    "hand", "foot", "head", "heart", "eye", "nose", "ear", "mouth", "hair", "music", "story", "song", "game", "picture",
    "word", "number", "language", "question", "time", "week", "month", "year", "today", "tomorrow", "monday", "friday",
    "birthday", "holiday", "party", "present", "money", "house", "home", "room", "kitchen", "wall", "floor", "roof",
    "street", "road", "country", "people", "man", "woman", "love", "hope", "peace", "light", "colour", "sound", "secret",
    "magic", "treasure", "adventure", "mystery", "science", "history", "nature", "beautiful", "wonderful", "important",
    "different", "difficult", "necessary", "because", "together", "always", "never", "strawberry", "mississippi",
]  # fmt: skip
WORDS = sorted(set(ANIMALS + FRUITS + COLOURS + FOODS + THINGS + PLACES + JOBS + NATURE + ADJECTIVES + VERBS + TECH + OTHER))
GROUPS: dict[str, list[str]] = {
    "animals": ANIMALS, "fruits": FRUITS, "colours": COLOURS, "foods": FOODS, "jobs": JOBS, "places": PLACES,
}  # fmt: skip

# Name -> pronoun, so that stories stay consistent.
NAMES: dict[str, str] = {
    "Anna": "she", "Bella": "she", "Chloé": "she", "Clara": "she", "Daisy": "she", "Ella": "she", "Emma": "she",
    "Grace": "she", "Hana": "she", "Ines": "she", "Julia": "she", "Lily": "she", "Lucy": "she", "Maria": "she",
    "Mia": "she", "Nina": "she", "Nora": "she", "Olga": "she", "Rosa": "she", "Ruby": "she", "Sara": "she",
    "Sofia": "she", "Tina": "she", "Vera": "she", "Yuki": "she", "Zoë": "she", "Zofia": "she", "Léa": "she",
    "Adam": "he", "Ali": "he", "Ben": "he", "Bruno": "he", "Carlos": "he", "David": "he", "Emil": "he", "Felix": "he",
    "Finn": "he", "George": "he", "Hugo": "he", "Ivan": "he", "Jack": "he", "José": "he", "Jürgen": "he", "Kenji": "he",
    "Leo": "he", "Łukasz": "he", "Max": "he", "Milo": "he", "Noah": "he", "Noël": "he", "Oscar": "he", "Otto": "he",
    "Paul": "he", "Peter": "he", "Ravi": "he", "Sam": "he", "Søren": "he", "Theo": "he", "Tom": "he", "Victor": "he",
    "Björn": "he", "André": "he", "Alice": "she", "Bob": "he", "John": "he", "Mary": "she", "Kate": "she", "Mark": "he",
}  # fmt: skip
CAPITALS: dict[str, str] = {
    "France": "Paris", "Germany": "Berlin", "Spain": "Madrid", "Italy": "Rome", "Portugal": "Lisbon",
    "Austria": "Vienna", "Poland": "Warsaw", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin", "Hungary": "Budapest", "Belgium": "Brussels",
    "Switzerland": "Bern", "the Netherlands": "Amsterdam", "Czechia": "Prague", "Russia": "Moscow", "Turkey": "Ankara",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi",
    "South Korea": "Seoul", "Thailand": "Bangkok", "Canada": "Ottawa", "Brazil": "Brasília", "Argentina": "Buenos Aires",
    "Chile": "Santiago", "Peru": "Lima", "Mexico": "Mexico City", "Cuba": "Havana", "Australia": "Canberra",
    "the United Kingdom": "London", "Ukraine": "Kyiv", "Iceland": "Reykjavík", "Romania": "Bucharest",
    "Bulgaria": "Sofia",
}  # fmt: skip
CITIES = [*CAPITALS.values(), "New York", "San Francisco", "Munich", "Zürich", "São Paulo", "Málaga", "Milan", "Sydney",
          "Boston", "Chicago", "Hamburg", "Lyon", "Porto", "Kraków", "Osaka", "Mumbai", "Lagos", "Toronto", "Seattle",
          "Geneva", "Malmö", "Bergen", "Naples", "Barcelona", "Marseille", "Cologne"]  # fmt: skip
OPPOSITES: dict[str, str] = {
    "big": "small", "hot": "cold", "happy": "sad", "old": "young", "fast": "slow", "day": "night", "up": "down",
    "left": "right", "open": "closed", "light": "dark", "loud": "quiet", "soft": "hard", "wet": "dry", "early": "late",
    "full": "empty", "rich": "poor", "strong": "weak", "long": "short", "high": "low", "good": "bad", "first": "last",
    "in": "out", "yes": "no", "black": "white", "near": "far", "thick": "thin", "heavy": "light", "clean": "dirty",
}  # fmt: skip
SOUNDS: dict[str, str] = {
    "cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink", "bee": "buzz",
    "lion": "roar", "frog": "ribbit", "hen": "cluck", "owl": "hoot", "snake": "hiss", "horse": "neigh", "mouse": "squeak",
    "wolf": "howl",
}  # fmt: skip
COLOUR_OF: dict[str, str] = {
    "the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "coal": "black", "a tomato": "red",
    "a carrot": "orange", "chocolate": "brown", "an elephant": "grey", "a lemon": "yellow", "the sea": "blue",
    "milk": "white", "a flamingo": "pink", "a strawberry": "red", "a frog": "green",
}  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December"]  # fmt: skip
TRANSLATIONS: dict[str, dict[str, str]] = {
    "French": {"hello": "bonjour", "thank you": "merci", "goodbye": "au revoir", "yes": "oui", "no": "non",
               "please": "s'il vous plaît", "cat": "chat", "dog": "chien", "water": "eau", "coffee": "café"},
    "Spanish": {"hello": "hola", "thank you": "gracias", "goodbye": "adiós", "yes": "sí", "no": "no",
                "please": "por favor", "cat": "gato", "dog": "perro", "water": "agua", "coffee": "café"},
    "German": {"hello": "hallo", "thank you": "danke", "goodbye": "auf Wiedersehen", "yes": "ja", "no": "nein",
               "please": "bitte", "cat": "Katze", "dog": "Hund", "water": "Wasser", "coffee": "Kaffee"},
    "Italian": {"hello": "ciao", "thank you": "grazie", "goodbye": "arrivederci", "yes": "sì", "no": "no",
                "please": "per favore", "cat": "gatto", "dog": "cane", "water": "acqua", "coffee": "caffè"},
    "Polish": {"hello": "cześć", "thank you": "dziękuję", "goodbye": "do widzenia", "yes": "tak", "no": "nie",
               "please": "proszę", "cat": "kot", "dog": "pies", "water": "woda", "coffee": "kawa"},
}  # fmt: skip
JOKES = [
    "Why did the token cross the road? To get to the other sequence!",
    "Why was the cache so calm? It had seen it all before.",
    "Why did the daemon never sleep? It was always listening.",
    "What do you call a bear with no teeth? A gummy bear!",
    "Why was the maths book sad? It had too many problems.",
    "What did the zero say to the eight? Nice belt!",
    "Why did the scarecrow win a prize? It was outstanding in its field.",
    "What is orange and sounds like a parrot? A carrot!",
    "Why do bees have sticky hair? They use honeycombs.",
    "What kind of tree fits in your hand? A palm tree!",
]
EMOJI = ["😊", "👋", "🙂", "😀", "🎉", "🌞", "❤️", "👍"]
